"""Renders the result files: tables into the README, charts as PNG."""
