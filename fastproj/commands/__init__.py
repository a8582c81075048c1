"""What each word after ``fastproj`` does.

A command is a file with ``main(argv)``, which parses its own options and returns the exit status.
cli.py imports the file when the command is called. The library imports nothing from here.
"""
