"""Forecasters: one file a method of the literature. `table` lists them, `base` says what one is.

Nothing is imported here, so that listing the methods stays free of torch.
"""
