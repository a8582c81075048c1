"""Backend adapters: one module each, the same functions; ``registry`` chooses among them."""
