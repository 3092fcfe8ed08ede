"""Numbers about pictures and answers, and what may be concluded from them."""
