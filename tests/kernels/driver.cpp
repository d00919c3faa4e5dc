// Calls functions of a library on memory that another process sends: under qemu, a library for another
// processor. It knows no function; who calls says which memory the arguments point to.
//
//     driver LIBRARY OPENMP
//
// In, on stdin, in 64-bit words; an address is one of the caller's:
//
//     'c'  name  result  regions: (address, size, bytes) ...  pointers: (where it lies, address) ...
//                        integers: (is it an address, value) ...  doubles
//     's'  name  value                                     a global int is set
//
// where a name is its length and its bytes, and a list is its length and its members. `result` is 'i', 'f'
// or 's': 64 bits of integer, a float, a string. Out, on stdout: the result (for a string its length, then
// its bytes), then the bytes of every region, in which pointers are the caller's again.
//
// Arguments go where the procedure call standard of AArch64 has integers and where it has doubles, whatever
// their order; of the first it passes eight in registers and more, 64 bits each, on the stack.
#include <dlfcn.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#if !defined(__aarch64__)
#error "the calls are those of AArch64"
#endif

typedef uint64_t Word;

[[noreturn]] static void fail(const std::string& words) {
    fprintf(stderr, "driver: %s\n", words.c_str());
    exit(3);
}

static void read_all(void* to, size_t size) {
    for (char* at = (char*)to; size > 0;) {
        ssize_t count = read(STDIN_FILENO, at, size);
        if (count <= 0) exit(count < 0 ? 2 : 0);  // whoever asked has gone
        at += count;
        size -= count;
    }
}

static void write_all(const void* from, size_t size) {
    for (const char* at = (const char*)from; size > 0;) {
        ssize_t count = write(STDOUT_FILENO, at, size);
        if (count <= 0) exit(2);
        at += count;
        size -= count;
    }
}

static Word read_word() {
    Word word;
    read_all(&word, sizeof word);
    return word;
}

static std::string read_name() {
    std::string name(read_word(), 0);
    read_all(&name[0], name.size());
    return name;
}

struct Region {
    Word address, size;
    char* block;
    char* bytes;

    // As far from a multiple of 64 as it is with the caller.
    Region() : address(read_word()), size(read_word()) {
        Word offset = address % 64;
        block = (char*)aligned_alloc(64, (offset + size + 63) / 64 * 64);
        bytes = block + offset;
        read_all(bytes, size);
    }
};

// Null for what is in no region: an array without members, say.
static char* find(const std::vector<Region>& regions, Word address) {
    for (const Region& region : regions)
        if (address >= region.address && address - region.address < region.size)
            return region.bytes + (address - region.address);
    return nullptr;
}

static void call(void* function, const std::string& name) {
    char result = read_word();
    std::vector<Region> regions(read_word());
    struct Pointer {
        char* at;
        Word value;
    };
    std::vector<Pointer> pointers(read_word());
    for (Pointer& pointer : pointers) {
        pointer.at = find(regions, read_word());
        if (!pointer.at) fail("a pointer of " + name + " lies in no region");
        pointer.value = read_word();
        char* target = find(regions, pointer.value);
        memcpy(pointer.at, &target, sizeof target);
    }
    Word i[12] = {}, count = read_word();
    if (count > 12) fail(name + " has more than 12 integers");
    for (Word n = 0; n < count; n++) {
        Word is_address = read_word(), value = read_word();
        i[n] = is_address ? (Word)find(regions, value) : value;
    }
    double d[2] = {};
    count = read_word();
    if (count > 2) fail(name + " has more than 2 doubles");
    read_all(d, count * sizeof(double));
#define ARGUMENTS i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], i[8], i[9], i[10], i[11], d[0], d[1]
#define TYPES Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, double, double
    if (result == 'f') {
        float value = ((float (*)(TYPES))function)(ARGUMENTS);
        write_all(&value, sizeof value);
    } else {
        Word value = ((Word (*)(TYPES))function)(ARGUMENTS);
        Word length = result == 's' ? strlen((const char*)value) : value;
        write_all(&length, sizeof length);
        if (result == 's') write_all((const char*)value, length);
    }
    for (Pointer& pointer : pointers) memcpy(pointer.at, &pointer.value, sizeof pointer.value);
    for (Region& region : regions) {
        write_all(region.bytes, region.size);
        free(region.block);
    }
}

int main(int, char** arguments) {
    if (!dlopen(arguments[2], RTLD_NOW | RTLD_GLOBAL)) fail(dlerror());
    void* library = dlopen(arguments[1], RTLD_NOW);
    if (!library) fail(dlerror());
    for (;;) {
        char kind = read_word();
        std::string name = read_name();
        void* found = dlsym(library, name.c_str());
        if (!found) fail("there is no " + name);
        if (kind == 'c') call(found, name);
        else *(int*)found = (int)read_word();
    }
}
