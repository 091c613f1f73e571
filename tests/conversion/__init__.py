"""Tests of merging, exporting, importing and converting."""
