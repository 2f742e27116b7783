"""Paper 24: flow straight and fast, learning to generate and transfer data with rectified flow."""
