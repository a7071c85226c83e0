"""The version, in one place; read by hatchling at build time and by the command line."""

__version__ = "0.1.0"
