"""HTTP for `bge-rerank serve`: uvicorn with h11, and additional limits.

tests/test_serve_transport.py shows why: uvicorn's other parser, httptools, loses the body of a
request with an Upgrade header, and does not limit a request's head; plain h11 answers a request
with two lengths twice. Requests that are refused here never reach the app.
"""
