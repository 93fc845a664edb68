# Substitute for TensorFlow's GPU image, which cannot be pulled everywhere: Debian with Python and TensorFlow's CUDA
# build, but no CUDA library.
FROM localhost/cifar10-job-debian:bookworm

COPY tensorflow.txt /tmp/tensorflow.txt
RUN rm /usr/lib/python3*/EXTERNALLY-MANAGED \
    && ln -s "$(command -v python3)" /usr/local/bin/python \
    && python -m pip install --no-cache-dir --no-deps --require-hashes -r /tmp/tensorflow.txt

# In the GPU image the loader finds a stub of the driver. Here a small library replaces it; sed can patch the name
# because both names have the same length.
RUN mkdir -p /usr/local/cuda/lib64/stubs \
    && sed 's/libutil\.so\.1/libcuda.so.1/' /lib/x86_64-linux-gnu/libutil.so.1 \
      > /usr/local/cuda/lib64/stubs/libcuda.so.1 \
    && echo /usr/local/cuda/lib64/stubs > /etc/ld.so.conf.d/z-cuda-stubs.conf \
    && ldconfig \
    && python -c 'import ctypes; ctypes.CDLL("libcuda.so.1")'
