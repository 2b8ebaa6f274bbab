"""What the loop of train.py calls: build, feed, optimise, save, watch."""
