"""What is known of each model: published facts, counted costs, and the cards made from both."""
