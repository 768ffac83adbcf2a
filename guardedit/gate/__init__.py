"""Comparing measured scores with written limits, and who may decide what. No torch."""
