"""What training will cost, before anything is allocated."""
