"""What only a checkout needs: the GPU run, and the command that draws the docs' tables and plots."""
