"""What requests and answers look like; the source of the OpenAPI description."""
