"""Where synchronous work runs: never on an event loop."""
