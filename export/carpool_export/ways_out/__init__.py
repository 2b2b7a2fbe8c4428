"""What a bundle may become beside a training program: a server's model, a program to search."""
