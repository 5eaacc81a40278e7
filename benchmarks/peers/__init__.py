"""This plugin beside other ways to run a model whose experts exceed the GPU's memory."""
