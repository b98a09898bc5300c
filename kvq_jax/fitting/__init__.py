# SPDX-License-Identifier: Apache-2.0
"""Fitting methods to calibration texts, once for all prompts.

`texts` cuts texts into windows or samples them from the model, `record` runs a window through the
model and keeps what each layer's cache would be given, `fit` fits methods to that, `store` saves
and loads the result, and `allocation` shares out a budget of bits, by `costs` or by what a method
measures itself. What all of these need to know of a method is in `contract`.
"""
