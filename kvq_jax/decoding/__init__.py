# SPDX-License-Identifier: Apache-2.0
"""Generating text: the decode loop, sampling, stop tokens and stop strings."""
