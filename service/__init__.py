"""The LaMamba service."""
