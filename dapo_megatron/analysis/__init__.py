"""What a trained model does, looked at after training: where its tokens are uncertain, and what training changed."""
