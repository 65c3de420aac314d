"""What training would learn from, shown before it is started: rows read, rendered and tokenised, without any weight."""
