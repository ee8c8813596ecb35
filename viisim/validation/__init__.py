"""How far the simulator is off: real workers beside the same requests in the simulator."""
