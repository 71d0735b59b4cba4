// What the GPU does around the networks: statistics of the scan, z-score and padding, cutting of
// tiles, writing of decisions, gating, counting, and the boxes of a region of interest.
// trtseg/tiling.py and trtseg/normalise.py are the reference for all of it.
//
// One source, two builds. nvcc and NVRTC compile it for the GPU; it includes no host header. With
// TRTSEG_HOST defined, a C++ compiler makes a host function of every kernel, which runs the threads
// one after another: that is how this file is tested where there is no GPU.
//
// Every kernel is one-dimensional and takes one struct by value, whose members all have 8 bytes, so
// that trtseg/cuda/launches.py can lay it out without knowing a compiler. No kernel shares memory
// between threads or uses atomics: sums go through lists of partial sums of fixed length, so their
// order, and with it every bit of the result, does not depend on the GPU. Voxel and element indices
// have 64 bits; those within one tile fit 32.

typedef long long Int;
typedef unsigned char Label;

#ifdef TRTSEG_HOST

#include <math.h>
#define DEVICE static inline
#define KERNEL(name, Parameters)                                  \
    static void name##_thread(const Parameters& p, Int thread);   \
    extern "C" void name(const Parameters* p, Int launched) {     \
        for (Int thread = 0; thread < launched; ++thread) {       \
            if (thread < p->threads) name##_thread(*p, thread);   \
        }                                                         \
    }                                                             \
    static void name##_thread(const Parameters& p, Int thread)

#else

#define DEVICE static __device__ __forceinline__
#define KERNEL(name, Parameters)                                           \
    DEVICE void name##_thread(const Parameters& p, Int thread);            \
    extern "C" __global__ void name(const Parameters p) {                  \
        const Int thread = (Int)blockIdx.x * blockDim.x + threadIdx.x;     \
        if (thread < p.threads) name##_thread(p, thread);                  \
    }                                                                      \
    DEVICE void name##_thread(const Parameters& p, Int thread)

#endif

// Statistics
//
// Mean, then variance about it, both in double. `partials` are summed in three steps, by as many
// threads as launches.py says (WIDE, NARROW, 1).

struct Partial {
    double sum;
    double varied;  // over 0 where some voxel differs from the first
};

struct Sums {
    Int threads;
    const void* voxels;  // dense, in any order
    Int count;
    const double* mean;
    Partial* partials;  // one per thread
};

template <typename Voxel>
DEVICE void sum_voxels(const Sums& p, Int thread) {
    const Voxel* voxels = (const Voxel*)p.voxels;
    const Voxel first = voxels[0];
    Partial partial = {0.0, 0.0};
    for (Int voxel = thread; voxel < p.count; voxel += p.threads) {
        partial.sum += (double)voxels[voxel];
        if (voxels[voxel] != first) partial.varied = 1.0;
    }
    p.partials[thread] = partial;
}

template <typename Voxel>
DEVICE void sum_squares(const Sums& p, Int thread) {
    const Voxel* voxels = (const Voxel*)p.voxels;
    const double mean = *p.mean;
    Partial partial = {0.0, 0.0};
    for (Int voxel = thread; voxel < p.count; voxel += p.threads) {
        const double difference = (double)voxels[voxel] - mean;
        partial.sum += difference * difference;
    }
    p.partials[thread] = partial;
}

struct Reduction {
    Int threads;
    const Partial* partials;
    Int count;
    Partial* sums;  // one per thread
};

KERNEL(reduce, Reduction) {
    Partial total = {0.0, 0.0};
    for (Int item = thread; item < p.count; item += p.threads) {
        total.sum += p.partials[item].sum;
        total.varied += p.partials[item].varied;
    }
    p.sums[thread] = total;
}

struct Finish {
    Int threads;
    const Partial* partials;
    Int count;
    Int divisor;
    double* result;
    double* varied;  // may be null
};

DEVICE Partial finish_sum(const Finish& p) {
    Partial total = {0.0, 0.0};
    for (Int item = 0; item < p.count; ++item) {
        total.sum += p.partials[item].sum;
        total.varied += p.partials[item].varied;
    }
    return total;
}

// Sum over divisor: a mean, or with divisor 1 a count.
KERNEL(finish_mean, Finish) {
    (void)thread;
    const Partial total = finish_sum(p);
    *p.result = total.sum / (double)p.divisor;
    if (p.varied) *p.varied = total.varied;
}

KERNEL(finish_deviation, Finish) {
    (void)thread;
    *p.result = sqrt(finish_sum(p).sum / (double)p.divisor);
}

// z-score and padding

struct Normalise {
    Int threads;  // voxels of the padded scan
    const void* voxels;
    const double* mean;       // null: the voxels are z-scores already
    const double* deviation;
    float* padded;            // C order
    Int shape[3];
    Int strides[3];           // of the voxels, in elements
    Int before[3];            // padding before the scan
    Int padded_shape[3];
};

// Position along an axis of `length` voxels after mirroring at the first and last voxel, neither of
// which is repeated: numpy's pad mode "reflect", for any distance.
DEVICE Int reflect(Int position, Int length) {
    if (length == 1) return 0;
    const Int period = 2 * (length - 1);
    const Int within = position % period;
    const Int forward = within < 0 ? within + period : within;
    return forward < length ? forward : period - forward;
}

template <typename Voxel>
DEVICE void normalise_voxel(const Normalise& p, Int thread) {
    Int rest = thread;
    Int offset = 0;
    for (int axis = 2; axis >= 0; --axis) {
        const Int position = rest % p.padded_shape[axis] - p.before[axis];
        rest /= p.padded_shape[axis];
        offset += reflect(position, p.shape[axis]) * p.strides[axis];
    }
    const double value = (double)((const Voxel*)p.voxels)[offset];
    p.padded[thread] = p.mean ? (float)((value - *p.mean) / *p.deviation) : (float)value;
}

#define FOR_VOXELS(Voxel, name)                                                      \
    KERNEL(sum_##name, Sums) { sum_voxels<Voxel>(p, thread); }                       \
    KERNEL(squares_##name, Sums) { sum_squares<Voxel>(p, thread); }                  \
    KERNEL(normalise_##name, Normalise) { normalise_voxel<Voxel>(p, thread); }

FOR_VOXELS(signed char, int8)
FOR_VOXELS(unsigned char, uint8)
FOR_VOXELS(short, int16)
FOR_VOXELS(unsigned short, uint16)
FOR_VOXELS(int, int32)
FOR_VOXELS(unsigned int, uint32)
FOR_VOXELS(long long, int64)
FOR_VOXELS(unsigned long long, uint64)
FOR_VOXELS(float, float32)
FOR_VOXELS(double, float64)

// Tiles
//
// A row of the table holds a tile's start in padded coordinates, then first and end voxel per axis
// of the box that it decides, in scan coordinates.

constexpr int ROW = 9;
constexpr int BOX = 3;

struct Gather {
    Int threads;  // batch * side^3
    const float* padded;
    const int* tiles;
    float* input;  // (batch, 1, side, side, side)
    Int first;     // row of the batch's first tile
    Int count;     // rows of the table; a batch that goes beyond repeats the last
    Int factor;
    Int side;
    Int field;     // receptive field
    Int padded_shape[3];
};

// Padded-scan index that a slot of a pathway's input sees along one axis, -1 for none: sampling
// restarts at index 0 where the window begins before the scan.
DEVICE Int sample(Int start, Int size, Int factor, Int field, Int slot) {
    const Int low = start + factor / 2 - (factor - 1) / 2 * field;
    const Int filled = low >= 0 ? 0 : -low / factor;
    if (slot < filled) return -1;
    const Int index = (low >= 0 ? low : 0) + (slot - filled) * factor;
    return index < size ? index : -1;
}

// Mean of the padded scan's corner voxels: what a pathway sees beyond the padding.
DEVICE float corner_mean(const float* padded, const Int* shape) {
    double sum = 0.0;
    for (int corner = 0; corner < 8; ++corner) {
        const Int i = corner & 4 ? shape[0] - 1 : 0;
        const Int j = corner & 2 ? shape[1] - 1 : 0;
        const Int k = corner & 1 ? shape[2] - 1 : 0;
        sum += (double)padded[(i * shape[1] + j) * shape[2] + k];
    }
    return (float)(sum / 8.0);
}

KERNEL(gather, Gather) {
    const Int per_tile = p.side * p.side * p.side;
    const Int row = p.first + thread / per_tile;
    const int* tile = p.tiles + ROW * (row < p.count ? row : p.count - 1);
    const int side = (int)p.side;
    const int slot = (int)(thread % per_tile);
    const int slots[3] = {slot / (side * side), slot / side % side, slot % side};
    Int offset = 0;
    for (int axis = 0; axis < 3; ++axis) {
        const Int index = sample(tile[axis], p.padded_shape[axis], p.factor, p.field, slots[axis]);
        if (index < 0) {
            p.input[thread] = corner_mean(p.padded, p.padded_shape);
            return;
        }
        offset = offset * p.padded_shape[axis] + index;
    }
    p.input[thread] = p.padded[offset];
}

struct Scatter {
    Int threads;  // batch * out^3
    const float* logit;  // (batch, out, out, out), class difference
    const int* tiles;
    Label* labels;         // C order, shape of the scan
    float* probabilities;  // likewise, or null
    double* not_finite;    // set to 1 where a logit of a box is not finite
    Int first;
    Int count;
    Int out;
    Int shape[3];
};

KERNEL(scatter, Scatter) {
    const Int per_tile = p.out * p.out * p.out;
    const Int row = p.first + thread / per_tile;
    if (row >= p.count) return;
    const int* tile = p.tiles + ROW * row;
    const int out = (int)p.out;
    const int local = (int)(thread % per_tile);
    const int place[3] = {local / (out * out), local / out % out, local % out};
    Int voxel = 0;
    for (int axis = 0; axis < 3; ++axis) {
        const int position = tile[axis] + place[axis];
        if (position < tile[BOX + 2 * axis] || position >= tile[BOX + 2 * axis + 1]) return;
        voxel = voxel * p.shape[axis] + position;
    }
    const float logit = p.logit[thread];
    p.labels[voxel] = logit > 0.0f;
    if (p.probabilities) p.probabilities[voxel] = 1.0f / (1.0f + expf(-logit));
    if (!isfinite(logit)) *p.not_finite = 1.0;  // every thread that writes, writes the same
}

// Labels

struct Gate {
    Int threads;  // voxels
    const Label* mask;
    Label* labels;
    float* probabilities;  // or null
};

KERNEL(gate, Gate) {
    if (p.mask[thread]) return;
    p.labels[thread] = 0;
    if (p.probabilities) p.probabilities[thread] = 0.0f;
}

struct Count {
    Int threads;
    const Label* labels;
    Int count;
    Partial* partials;  // one per thread
};

KERNEL(count_labels, Count) {
    Partial partial = {0.0, 0.0};
    for (Int voxel = thread; voxel < p.count; voxel += p.threads) {
        if (p.labels[voxel]) partial.sum += 1.0;
    }
    p.partials[thread] = partial;
}

// Region of interest
//
// The smallest box around the mask's voxels within each tile's box, in two steps: per tile and
// plane along the first axis, then per tile. Low equals high where there are none.

struct Span {
    int low;
    int high;
};

DEVICE Span joined(Span one, Span other) {
    if (one.low == one.high) return other;
    if (other.low == other.high) return one;
    const Span both = {
        one.low < other.low ? one.low : other.low, one.high > other.high ? one.high : other.high};
    return both;
}

struct Planes {
    Int threads;  // tiles * out
    const Label* mask;
    const int* tiles;
    Span* planes;  // (tiles, out, 2): what lies along the second and the third axis
    Int out;
    Int shape[3];
};

KERNEL(roi_planes, Planes) {
    const int* box = p.tiles + ROW * (thread / p.out) + BOX;
    const Int i = box[0] + thread % p.out;
    Span second = {0, 0};
    Span third = {0, 0};
    if (i < box[1]) {
        for (int j = box[2]; j < box[3]; ++j) {
            const Label* line = p.mask + (i * p.shape[1] + j) * p.shape[2];
            for (int k = box[4]; k < box[5]; ++k) {
                if (!line[k]) continue;
                second = joined(second, Span{j, j + 1});
                third = joined(third, Span{k, k + 1});
            }
        }
    }
    p.planes[2 * thread] = second;
    p.planes[2 * thread + 1] = third;
}

struct Boxes {
    Int threads;  // tiles
    const int* tiles;
    const Span* planes;
    Span* boxes;  // (tiles, 3)
    Int out;
};

KERNEL(roi_boxes, Boxes) {
    const int low = p.tiles[ROW * thread + BOX];
    Span box[3] = {{0, 0}, {0, 0}, {0, 0}};
    for (int plane = 0; plane < (int)p.out; ++plane) {
        const Span* spans = p.planes + 2 * (thread * p.out + plane);
        if (spans[0].low == spans[0].high) continue;
        box[0] = joined(box[0], Span{low + plane, low + plane + 1});
        box[1] = joined(box[1], spans[0]);
        box[2] = joined(box[2], spans[1]);
    }
    for (int axis = 0; axis < 3; ++axis) p.boxes[3 * thread + axis] = box[axis];
}
