# Stands in for TensorFlow's GPU image where that cannot be pulled: Debian with Python and TensorFlow's
# CUDA build, but, as reported of that image, neither cuDNN 9 nor NCCL.
FROM localhost/cifar10-job-debian:bookworm

COPY tensorflow.txt /tmp/tensorflow.txt
RUN rm /usr/lib/python3*/EXTERNALLY-MANAGED \
    && ln -s "$(command -v python3)" /usr/local/bin/python \
    && python -m pip install --no-cache-dir --no-deps --require-hashes -r /tmp/tensorflow.txt

# Without a GPU nothing calls the CUDA libraries that the real base has. Their 2 GB are left out: under
# each of their names stands a library that can be loaded and does nothing for CUDA.
RUN mkdir -p /usr/local/cuda/lib64 \
    && for name in libcudart.so.12 libcublas.so.12 libcublasLt.so.12 libcufft.so.11 libcusolver.so.11 libcusparse.so.12; do \
         ln -s /lib/x86_64-linux-gnu/libm.so.6 "/usr/local/cuda/lib64/$name"; done
ENV LD_LIBRARY_PATH=/usr/local/cuda/lib64
