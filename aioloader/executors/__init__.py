"""Where synchronous functions run: in threads or processes, never on an event loop."""
