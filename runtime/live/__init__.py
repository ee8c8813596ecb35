"""Real workers measured: what `viisim calibrate --live` and `viisim validate --live` send them."""
