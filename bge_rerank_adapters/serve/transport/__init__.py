"""How `bge-rerank serve` speaks HTTP: uvicorn with h11, and limits of our own around it.

Chosen by tests/test_serve_transport.py: uvicorn's other parser, httptools, loses the body of a
request that asks for an upgrade, and has no bound for a request's head; h11 alone answers a request
with two lengths twice. What is refused here never reaches the app.
"""
