"""CHITA: masks and new weights from a quadratic model of the loss."""
