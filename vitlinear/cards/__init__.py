"""Model cards, made of published facts and counted costs; the commands that print them."""
