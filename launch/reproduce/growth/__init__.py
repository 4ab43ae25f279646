"""Growth by ranks: bytes of the collectives of a step, efficiency predicted from them, weak scaling measured."""
