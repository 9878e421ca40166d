"""What every program needs of its surroundings: JSON from strangers, standard streams, names of outputs."""
