"""What each word after ``fastproj`` does.

A command is a file with ``build_parser()``, its options, and ``main(argv)``, which returns the exit
status. cli.py imports the file when the command is called. The library imports nothing from here.
"""
