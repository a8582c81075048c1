"""What each word after ``fastproj`` does.

A command is a function of its arguments that parses its own options and returns the exit status.
cli.py imports it when it is called; the library imports nothing from here.
"""
