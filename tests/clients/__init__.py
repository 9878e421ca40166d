"""Coding agents and libraries, the real ones, against a started server: `python -m tests.clients [NAME ...]`.

Run by hand: the packages have hundreds of megabytes. They are installed from npm and PyPI into a cache directory, and
run with a fresh home, in an empty project, and where the system allows it in a network that is nothing but loopback.
"""
