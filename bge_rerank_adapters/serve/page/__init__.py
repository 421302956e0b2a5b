"""The pages for a person: one to try the server with, one that shows what it answers.

Each is one file without any other request but to the server itself: scripts and styles are in it,
and the content security policy names their sums and allows nothing else.
"""
