"""A whole job: what there is to do, doing it on Ray, and saying how far it is."""
