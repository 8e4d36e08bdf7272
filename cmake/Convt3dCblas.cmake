# Finds the CBLAS behind the CPU backend: the scipy-openblas32 package, else what CMake finds on the system.
# Defines target convt3d_cblas and CONVT3D_CBLAS_LIBRARIES, if there is one; and CONVT3D_CBLAS_BUNDLED: the libraries to
# ship with the Python package, if any.
find_package(Python COMPONENTS Interpreter QUIET)
set(CONVT3D_CBLAS_LIBRARIES "")
set(CONVT3D_CBLAS_BUNDLED "")

if(Python_Interpreter_FOUND)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
            "import scipy_openblas32 as blas; print(blas.get_include_dir(), blas.get_lib_dir(), sep=';')"
    OUTPUT_VARIABLE package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE status)
  if(status EQUAL 0)
    list(GET package 0 include_dir)
    list(GET package 1 lib_dir)
    set(CONVT3D_CBLAS_LIBRARIES ${lib_dir}/libscipy_openblas.so)
    add_library(convt3d_cblas INTERFACE)
    target_include_directories(convt3d_cblas INTERFACE ${include_dir})
    target_compile_definitions(convt3d_cblas INTERFACE CONVT3D_OPENBLAS CONVT3D_BLAS_PREFIX=scipy_)
    file(GLOB CONVT3D_CBLAS_BUNDLED ${lib_dir}/*.so*)
  endif()
endif()

if(NOT TARGET convt3d_cblas)
  find_package(BLAS QUIET)
  find_path(CONVT3D_CBLAS_INCLUDE_DIR cblas.h PATH_SUFFIXES openblas openblas-pthread openblas-openmp)
  if(BLAS_FOUND AND CONVT3D_CBLAS_INCLUDE_DIR)
    include(CheckCXXSymbolExists)
    set(CMAKE_REQUIRED_LIBRARIES ${BLAS_LIBRARIES})
    set(CMAKE_REQUIRED_INCLUDES ${CONVT3D_CBLAS_INCLUDE_DIR})
    check_cxx_symbol_exists(cblas_sgemm cblas.h CONVT3D_HAVE_CBLAS)
    check_cxx_symbol_exists(openblas_set_num_threads cblas.h CONVT3D_HAVE_OPENBLAS)
    unset(CMAKE_REQUIRED_LIBRARIES)
    unset(CMAKE_REQUIRED_INCLUDES)
    if(CONVT3D_HAVE_CBLAS)
      set(CONVT3D_CBLAS_LIBRARIES ${BLAS_LIBRARIES})
      add_library(convt3d_cblas INTERFACE)
      target_include_directories(convt3d_cblas INTERFACE ${CONVT3D_CBLAS_INCLUDE_DIR})
      if(CONVT3D_HAVE_OPENBLAS)
        target_compile_definitions(convt3d_cblas INTERFACE CONVT3D_OPENBLAS)
      endif()
    endif()
  endif()
endif()

if(TARGET convt3d_cblas)
  target_link_libraries(convt3d_cblas INTERFACE ${CONVT3D_CBLAS_LIBRARIES})
  message(STATUS "convt3d: CPU backend on ${CONVT3D_CBLAS_LIBRARIES}")
endif()
