"""What a judge has said, made into examples for a smaller judge, and judges held to each other and to the truth."""
