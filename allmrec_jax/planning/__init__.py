"""`allmrec plan`: what a config needs on hardware that is not there."""
