"""Checks."""
def check_config(config): pass
def check_config_files(config): pass
