"""The top of the installed package; its parts are the folders next to this one: bifrost.kernels, bifrost.data, …"""

__version__ = "0.1.0"
"""The only place of the version: setup.py reads it here. CHANGELOG.md lists what each one holds."""
