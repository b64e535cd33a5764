"""How the memory of the devices is divided: the plan, and what a loaded model is measured to take."""
