"""The verbs of the command line, a file a subject: the words of a verb stand beside its work."""
