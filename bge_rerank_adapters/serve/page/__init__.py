"""Two web pages: one to try the server with, and one that documents its API.

Each is a single HTML file that sends requests only to the server itself. Scripts and styles are in
the file, and the content security policy allows only those with their hashes.
"""
