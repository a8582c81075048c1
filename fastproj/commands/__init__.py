"""What each word after ``fastproj`` does: ``main(argv)`` parses its options, and returns the exit
status. Nothing else in fastproj imports from here."""
