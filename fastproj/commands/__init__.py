"""What each word after ``fastproj`` does.

A command is a file with ``main(argv)``, which parses its own options and returns the exit status.
cli.py imports it when it is called; the library imports nothing from here.
"""
