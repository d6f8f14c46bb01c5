"""The HTTP/1.1 client of the hot path: plain sockets in one private epoll, no task or future a request (ADR 0005)."""
