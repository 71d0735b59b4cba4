"""Fetal-brain cortex segmentation from 3-D T2w MRI."""

from __future__ import annotations

__version__ = "0.1.0.dev0"
