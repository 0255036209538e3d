"""Balance losses: a model whose residual is zero on every transition or trajectory samples the tilted prior."""
